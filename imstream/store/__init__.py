"""The Redis keys of chat: requests, replies, leases, inboxes, routes and accounts, and their Lua scripts."""
