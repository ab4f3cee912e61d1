"""What users do, from one end to the other, on real parts."""
