-- Record that a message waits for a worker, with its question, unless its reply exists.
--
-- KEYS[1]  stream      reply to the message
-- KEYS[2]  set         nodes that hold a socket of the user
-- KEYS[3]  sorted set  messages of the user -> when they were asked, in ms since 1970; expires
-- ARGV[1]  milliseconds to keep the reply
-- ARGV[2]  message id
-- ARGV[3]  question
-- ARGV[4]  digest of the whole question
-- ARGV[5]  how many messages are kept in KEYS[3]
-- ARGV[6]  its request: node and entry id
-- Returns  {'queued', node, …} | {'known'} when the reply stream was there

if redis.call('EXISTS', KEYS[1]) == 1 then
    return {'known'}
end
local nodes = redis.call('SMEMBERS', KEYS[2])
local id = redis.call(
    'XADD', KEYS[1], '*', 'attempt', 0, 'event', 'queued', 'offset', 0, 'v', 1, 'question', ARGV[3], 'digest', ARGV[4],
    'request', ARGV[6]
)
redis.call('PEXPIRE', KEYS[1], ARGV[1])

-- As in open.lua. The list must not keep a message from being answered, should it have another type.
local added = redis.pcall('ZADD', KEYS[3], 'NX', string.match(id, '^%d+'), ARGV[2])
if type(added) == 'number' then
    local over = added == 1 and redis.call('ZCARD', KEYS[3]) - ARGV[5] or 0
    if over > 0 then
        redis.call('ZREM', KEYS[3], unpack(redis.call('ZRANGE', KEYS[3], 0, over - 1)))
    end
    if redis.call('PTTL', KEYS[3]) < tonumber(ARGV[1]) then
        redis.call('PEXPIRE', KEYS[3], math.floor(ARGV[1] * 1.2)) -- not again for each message
    end
end
return {'queued', unpack(nodes)}
