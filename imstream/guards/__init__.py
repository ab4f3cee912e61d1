"""Checks that logins, messages and answers must pass. `chain.py` lists the guards in order."""
