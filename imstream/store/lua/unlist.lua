-- Remove a node from the directory, unless it was seen since it was found to be gone. It may be back when this runs.
--
-- KEYS[1]  sorted set  nodes -> last beat
-- ARGV[1]  the node
-- ARGV[2]  until when it may have been seen, in ms since 1970
-- Returns  1 when it was removed, else 0

local seen = redis.call('ZSCORE', KEYS[1], ARGV[1])
return seen and tonumber(seen) <= tonumber(ARGV[2]) and redis.call('ZREM', KEYS[1], ARGV[1]) or 0
