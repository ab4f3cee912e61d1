-- Admit one request: test the caps and append, in one step, so that there is no lock and nothing is ever evicted (I2).
--
-- KEYS[1]  stream  requests of the node
-- KEYS[2]  hash    user -> unfinished requests
-- ARGV[1]  maximum of unfinished requests of the node
-- ARGV[2]  maximum of unfinished requests of one user
-- ARGV[3]  consumer group
-- ARGV[4]  user
-- ARGV[5…] field, value, … of the entry
-- Returns  {'admitted', entry id, requests not yet given to a worker, unfinished requests} | {'node_full'} | {'user_full'}

local unfinished = redis.call('XLEN', KEYS[1])
if unfinished >= tonumber(ARGV[1]) then
    return {'node_full'}
end
if tonumber(redis.call('HGET', KEYS[2], ARGV[4]) or 0) >= tonumber(ARGV[2]) then
    return {'user_full'}
end
local id = redis.call('XADD', KEYS[1], '*', unpack(ARGV, 5))
redis.call('HINCRBY', KEYS[2], ARGV[4], 1)
-- Nothing is pending in a stream that was empty, or before the first worker came: then there is no group.
local pending = unfinished == 0 and {0} or redis.pcall('XPENDING', KEYS[1], ARGV[3])
return {'admitted', id, unfinished + 1 - (pending.err and 0 or pending[1]), unfinished + 1}
