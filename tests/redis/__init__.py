"""The store and the worker on real Redis and Valkey servers."""
