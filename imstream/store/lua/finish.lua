-- Remove one finished request from the stream: acknowledge, delete and uncount in one step (I3). Idempotent.
--
-- KEYS[1]  stream  requests of the node
-- KEYS[2]  hash    user -> unfinished requests
-- ARGV[1]  consumer group
-- ARGV[2]  entry id
-- ARGV[3]  user
-- Returns  {1 when the entry was there, else 0, unfinished requests that are left}

redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
local removed = redis.call('XDEL', KEYS[1], ARGV[2])
-- XDEL came first: a script that has written may go on writing when memory is full.
if removed == 1 and redis.call('HINCRBY', KEYS[2], ARGV[3], -1) <= 0 then
    redis.call('HDEL', KEYS[2], ARGV[3])
end
return {removed, redis.call('XLEN', KEYS[1])}
