"""Programs for the development of imstream; they are not installed."""
