-- Move one request to the dead stream: append there, acknowledge, delete and uncount in one step (I3). Idempotent.
--
-- KEYS[1]  stream  requests of the node
-- KEYS[2]  hash    user -> unfinished requests
-- KEYS[3]  stream  dead letters of the node
-- ARGV[1]  consumer group
-- ARGV[2]  entry id
-- ARGV[3]  user
-- ARGV[4]  milliseconds to keep dead letters: the stream expires so long after the newest
-- ARGV[5…] field, value, … that replace or are added to those of the entry
-- Returns  {1 when the entry was there, else 0, unfinished requests that are left}

local entries = redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2])
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
if #entries == 0 then
    return {0, redis.call('XLEN', KEYS[1])}
end
redis.call('XDEL', KEYS[1], ARGV[2])
local fields, added = {unpack(ARGV, 5)}, {}
for i = 1, #fields, 2 do
    added[fields[i]] = true
end
local entry = entries[1][2]
for i = 1, #entry, 2 do
    if not added[entry[i]] then
        fields[#fields + 1], fields[#fields + 2] = entry[i], entry[i + 1]
    end
end
redis.call('XADD', KEYS[3], '*', unpack(fields))
redis.call('PEXPIRE', KEYS[3], ARGV[4])
if redis.call('HINCRBY', KEYS[2], ARGV[3], -1) <= 0 then
    redis.call('HDEL', KEYS[2], ARGV[3])
end
return {1, redis.call('XLEN', KEYS[1])}
