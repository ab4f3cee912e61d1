"""Values with units, as the documents show them: with three significant digits, and to be read again."""

import math

UNITS = {
    "": 1.0,
    "cores": 1.0,
    "s": 1.0,
    "ms": 1e-3,
    "µs": 1e-6,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "Mbit/s": 1e6,
    "per s": 1.0,
}
"""Units of the document, as multiples of seconds, bytes and bits."""


def show(value: float, unit: str) -> str:
    """Format a value in its unit, with three significant digits; whole counts with all digits."""
    scaled = value / UNITS[unit]
    if scaled and (unit or scaled != int(scaled)):
        scaled = round(scaled, 2 - math.floor(math.log10(abs(scaled))))
    digits = f"{scaled:,.0f}" if scaled == int(scaled) else f"{scaled:.6f}".rstrip("0")
    return f"{digits} {unit}".strip()


def parse(shown: str) -> float:
    """The value that `show` has formatted."""
    number, _, unit = shown.partition(" ")
    return float(number.replace(",", "")) * UNITS[unit]
