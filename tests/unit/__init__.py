"""One module at a time, without a network beyond a local socket."""
