-- End the adoption of a stream and leave its consumer group, unless requests are still pending under our name: deleting
-- a consumer forgets its pending entries.
--
-- KEYS[1]  string  adopter of the stream's node
-- KEYS[2]  stream  its requests
-- ARGV[1]  the node that adopted it
-- ARGV[2]  consumer group
-- Returns  requests still pending under our name

if redis.call('GET', KEYS[1]) == ARGV[1] then
    redis.call('DEL', KEYS[1])
end
local pending = redis.pcall('XPENDING', KEYS[2], ARGV[2], '-', '+', 1, ARGV[1])
if pending.err then -- no such stream or group any more
    return 0
end
if #pending == 0 then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[2], ARGV[2], ARGV[1])
end
return #pending
