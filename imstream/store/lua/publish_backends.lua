-- Replace the states of a node's backends.
--
-- KEYS[1]  hash  name -> state (JSON)
-- ARGV[1]  ms until it expires
-- ARGV[2…] name, state, …
-- Returns  nothing

redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
