-- Remove a consumer from the group of a stream, unless it has pending entries: deleting a consumer forgets them.
--
-- KEYS[1]  stream  requests of a node
-- KEYS[2]  string  adopter of the node; absent unless the consumer also ends its adoption
-- ARGV[1]  consumer group
-- ARGV[2]  consumer
-- Returns  its pending entries

if KEYS[2] and redis.call('GET', KEYS[2]) == ARGV[2] then
    redis.call('DEL', KEYS[2])
end
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2])
if pending.err then -- no such stream or group any more
    return 0
end
if #pending == 0 then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
end
return #pending
