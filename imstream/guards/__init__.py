"""What a message passes before it costs anything: each guard is one module here, found by itself.

To add one, write one file in this folder with a subclass of `Guard` (see `guard.py`), its settings (a `SettingsGroup`
that its `make` loads; those that are here already have theirs among the node's) and its sentences.
"""
