-- Move one request to the dead stream: append there, acknowledge, delete and uncount in one step (I3). Idempotent.
--
-- KEYS[1]  stream  requests of the node
-- KEYS[2]  hash    user -> unfinished requests
-- KEYS[3]  stream  dead letters of the node
-- ARGV[1]  consumer group
-- ARGV[2]  entry id
-- ARGV[3]  user
-- ARGV[4]  about how many dead letters are kept
-- ARGV[5…] field, value, … that are added to those of the entry
-- Returns  {1 when the entry was there, else 0, unfinished requests that are left}

local entries = redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2])
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
if #entries == 0 then
    return {0, redis.call('XLEN', KEYS[1])}
end
redis.call('XDEL', KEYS[1], ARGV[2])
local fields = entries[1][2]
for i = 5, #ARGV do
    fields[#fields + 1] = ARGV[i]
end
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[4], '*', unpack(fields))
if redis.call('HINCRBY', KEYS[2], ARGV[3], -1) <= 0 then
    redis.call('HDEL', KEYS[2], ARGV[3])
end
return {1, redis.call('XLEN', KEYS[1])}
