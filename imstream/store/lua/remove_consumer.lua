-- Remove a consumer from the group of a stream, unless it has pending entries: deleting a consumer forgets them.
--
-- KEYS[1]  stream  requests of a node
-- ARGV[1]  consumer group
-- ARGV[2]  consumer
-- Returns  1 when it is removed, 0 when it has pending entries

if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) > 0 then
    return 0
end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return 1
