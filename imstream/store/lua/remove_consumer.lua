-- Take a consumer that is gone out of the group of a stream, unless requests are pending under its name: deleting a
-- consumer forgets what is pending.
--
-- KEYS[1]  stream  requests of a node
-- ARGV[1]  consumer group
-- ARGV[2]  consumer
-- Returns  1 when it is gone, 0 when something is pending

if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) > 0 then
    return 0
end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return 1
