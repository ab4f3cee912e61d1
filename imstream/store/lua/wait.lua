-- Record that an attempt without text waits for its backend, or that an operator's pause has ended an attempt. Refused
-- as an append is (I4).
--
-- KEYS[1]  stream  reply to the message
-- KEYS[2]  set     nodes that hold a socket of the user
-- ARGV[1]  attempt
-- ARGV[2]  milliseconds to keep the reply
-- ARGV[3]  milliseconds of the retry window; '' for a pause, after which another window begins
-- ARGV[4…] field, value, …: why it waits
-- Returns  {'waiting', milliseconds since it began to wait, node, …} | {'superseded', attempt} | {'ended', event}
--          | {'gone'}

local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if not last then
    return {'gone'}
end
local known = {}
for i = 1, #last[2], 2 do
    known[last[2][i]] = last[2][i + 1]
end
if known.attempt ~= ARGV[1] then
    return {'superseded', known.attempt}
end
if known.event == 'done' or known.event == 'failed' or known.event == 'cancelled' then
    return {'ended', known.event}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local since = known.since or now
-- A write that needs no memory comes first: then the script may go on writing when memory is full, and drain.
redis.call('PEXPIRE', KEYS[1], ARGV[2])
local entry = {'attempt', ARGV[1], 'event', 'waiting', 'offset', known.offset, 'v', 1, unpack(ARGV, 4)}
for _, part in ipairs(ARGV[3] ~= '' and {'since', since, 'until', since + ARGV[3]} or {}) do
    entry[#entry + 1] = part
end
redis.call('XADD', KEYS[1], '*', unpack(entry))
return {'waiting', now - since, unpack(redis.call('SMEMBERS', KEYS[2]))}
