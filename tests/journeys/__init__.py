"""Uses of imstream from end to end, on real parts."""
