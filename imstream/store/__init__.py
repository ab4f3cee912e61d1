"""Every Redis command of imstream: the connection, the requests stream, the reply streams, and their Lua scripts."""
