"""The demo AI backend: no model, but the real protocol over HTTP.

It answers every question with a canned text that quotes it, at a human pace, in its own process. It fails, hangs and
breaks off as configured: for a share of all calls by its settings, or for one question by a marker in it. It is meant
for first steps, and for tests of everything in front of a model.
"""
