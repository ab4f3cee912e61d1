"""Programs for those who work on imstream; nothing of it is installed."""
