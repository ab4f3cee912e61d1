-- Acquire or renew the lease of a node: its holder is the one process that may run under this id.
--
-- Also record on which run of Redis that was. A process that ended together with Redis was not killed by its
-- requests: when the next process acquires the lease and finds that Redis was restarted since, the deliveries of pending
-- entries are reduced by one, so that the end of that process does not count.
--
-- KEYS[1]  string  lease of the node, expires
-- KEYS[2]  string  the Redis on which the lease was last held, expires: its run id, the instance, and 1 when that one
--                  found Redis restarted since the instance before it
-- KEYS[3]  stream  requests of the node
-- KEYS[4]  hash    status of the node, valid while its instance holds the lease; kept as long as KEYS[2], to tell when
--                  Redis comes back with older data. Not in the lease: older releases refuse unknown fields.
-- ARGV[1]  instance, unique to the process
-- ARGV[2]  the holder as JSON, with the instance in it
-- ARGV[3]  milliseconds
-- ARGV[4]  an instance known to be dead, whose lease may be taken over; or ''
-- ARGV[5]  consumer group
-- ARGV[6]  the node, as a consumer
-- ARGV[7]  milliseconds to keep KEYS[2]
-- ARGV[8…] field, value, … of the status
-- Returns  {'held', '1' when Redis was restarted since the instance before, unfinished requests, id of the first or '',
--            time in ms, that of the renewal before as recorded in the status or ''} by this process
--          | {'refused', the holder as JSON, milliseconds left}

local holder = redis.call('GET', KEYS[1])
local ours = holder and string.find(holder, ARGV[1], 1, true)
local dead = holder and ARGV[4] ~= '' and string.find(holder, ARGV[4], 1, true)
if holder and not ours and not dead then
    return {'refused', holder, redis.call('PTTL', KEYS[1])}
end
if holder == ARGV[2] then -- and no SET, which is refused when memory is full
    redis.call('PEXPIRE', KEYS[1], ARGV[3])
else
    -- A write that needs no memory comes first: then the script may go on writing when memory is full, and drain.
    redis.call('DEL', KEYS[1])
    redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
end

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local renewed = redis.pcall('HGET', KEYS[4], 'renewed')
if #ARGV > 7 then
    redis.call('DEL', KEYS[4])
    redis.call('HSET', KEYS[4], 'renewed', string.format('%.0f', now_ms), unpack(ARGV, 8))
    redis.call('PEXPIRE', KEYS[4], ARGV[7])
end

local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)') or '?'
local known = redis.pcall('GET', KEYS[2])
known = type(known) == 'string' and known or '' -- a key of another type is replaced below
local before, instance, restarted = string.match(known, '^(%S+) (%S+) (%S+)$')
if instance ~= ARGV[1] then
    restarted = before and before ~= run and '1' or '0'
    if restarted == '1' then
        local pending = redis.pcall('XPENDING', KEYS[3], ARGV[5], '-', '+', 100000, ARGV[6])
        for _, one in ipairs(pending.err and {} or pending) do
            local deliveries = math.max(0, one[4] - 1)
            redis.call('XCLAIM', KEYS[3], ARGV[5], ARGV[6], 0, one[1], 'RETRYCOUNT', deliveries, 'JUSTID')
        end
    end
end
local now = run .. ' ' .. ARGV[1] .. ' ' .. restarted
if now == known then
    redis.call('PEXPIRE', KEYS[2], ARGV[7])
else
    redis.call('DEL', KEYS[2])
    redis.call('SET', KEYS[2], now, 'PX', ARGV[7])
end
-- For metrics: a stream of another type must not cost the lease.
local length, first = redis.pcall('XLEN', KEYS[3]), redis.pcall('XRANGE', KEYS[3], '-', '+', 'COUNT', 1)[1]
renewed = type(renewed) == 'string' and renewed or ''
return {'held', restarted, tonumber(length) or 0, first and first[1] or '', now_ms, renewed}
