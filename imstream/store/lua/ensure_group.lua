-- Create the consumer group if it is missing, at the beginning of the stream, so that entries older than the group are
-- delivered; and recount the users' unfinished requests, in case the stream was changed by hand.
--
-- KEYS[1]  stream  requests of the node
-- KEYS[2]  hash    user -> unfinished requests
-- ARGV[1]  consumer group
-- Returns  1 when the group was made, 0 when it was there

-- A write that needs no memory comes first: then the script may go on writing when memory is full, and the node drain.
redis.call('DEL', KEYS[2])
local made = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if made.err and not string.find(made.err, '^%-?BUSYGROUP') then
    return redis.error_reply(made.err)
end
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+')) do
    for i = 1, #entry[2], 2 do
        if entry[2][i] == 'user' then
            redis.call('HINCRBY', KEYS[2], entry[2][i + 1], 1)
        end
    end
end
return made.err and 0 or 1
