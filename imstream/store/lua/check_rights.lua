-- Try each command that nodes use, on a key of its own, so that denied or refused commands are found before they matter.
--
-- KEYS[1]  a key that nothing else uses; it is deleted
-- Returns  {command, error, …} for each that failed

local key, failed = KEYS[1], {}

local function try(...)
    local answer = redis.pcall(...)
    if type(answer) == 'table' and answer.err then
        failed[#failed + 1], failed[#failed + 2] = (...), answer.err
    end
    return answer
end

-- A write comes first that needs memory: after any other one, this script would be allowed more of it.
local id = try('XADD', key, '*', 'name', 'value')
id = type(id) == 'string' and id or '1-1'
try('XLEN', key)
try('XRANGE', key, '-', '+')
try('XREVRANGE', key, '+', '-')
try('XREAD', 'STREAMS', key, '0')
try('XGROUP', 'CREATE', key, 'group', '0')
try('XREADGROUP', 'GROUP', 'group', 'consumer', 'STREAMS', key, '>')
try('XPENDING', key, 'group')
try('XCLAIM', key, 'group', 'consumer', '0', id, 'JUSTID')
try('XINFO', 'CONSUMERS', key, 'group')
try('XACK', key, 'group', id)
try('XGROUP', 'DELCONSUMER', key, 'group', 'consumer')
try('XTRIM', key, 'MAXLEN', '1')
try('MEMORY', 'USAGE', key)
try('XDEL', key, id)
try('DEL', key)
try('HSET', key, 'name', '1')
try('HGET', key, 'name')
try('HMGET', key, 'name')
try('HGETALL', key)
try('HEXISTS', key, 'name')
try('HINCRBY', key, 'name', '1')
try('HDEL', key, 'name')
try('DEL', key)
try('SET', key, '1')
try('GET', key)
try('INCR', key)
try('EXISTS', key)
try('PTTL', key)
try('PEXPIREAT', key, '9999999999999')
try('PEXPIRE', key, '1000')
try('DEL', key)
try('ZADD', key, '1', 'member')
try('ZRANGE', key, '0', '-1')
try('ZREVRANGE', key, '0', '-1')
try('ZCARD', key)
try('ZSCORE', key, 'member')
try('ZREM', key, 'member')
try('SADD', key, 'member')
try('SMEMBERS', key)
try('SREM', key, 'member')
try('DEL', key)
try('SCAN', '0', 'COUNT', '1')
try('TIME')
try('INFO', 'server')
return failed
