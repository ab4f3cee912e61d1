-- Append text, or the terminal event with the last text, to a reply. Refused when a later attempt has begun or the
-- reply has ended (I4), or when text would be missing or repeated (I5). Idempotent.
--
-- KEYS[1]  stream  reply to the message
-- KEYS[2]  set     nodes that hold a socket of the user; read after the append, so that no batch falls between
-- ARGV[1]  attempt
-- ARGV[2]  event: text | done | failed
-- ARGV[3]  offset before the text
-- ARGV[4]  offset after it
-- ARGV[5]  text
-- ARGV[6]  milliseconds to keep the reply
-- ARGV[7…] field, value, … of a terminal event, or 'thinking', 1: the model reasons and has no text yet
-- Returns  {'appended', node, …} | {'repeated', node, …} when it was appended before | {'superseded', attempt}
--          | {'ended', event} | {'gone'} | {'gap', offset}

local TERMINAL = {done = true, failed = true, cancelled = true}

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
if known.event == ARGV[2] and known.offset == ARGV[4] and (known.event ~= 'text' or ARGV[3] ~= ARGV[4]) then
    return {'repeated', unpack(redis.call('SMEMBERS', KEYS[2]))}
end
if TERMINAL[known.event] then
    return {'ended', known.event}
end
if known.offset ~= ARGV[3] then
    return {'gap', known.offset}
end
if known.since and ARGV[7] == 'thinking' then -- for wait.lua: the backend may go away again
    ARGV[9], ARGV[10] = 'since', known.since
end
-- A write that needs no memory comes first: then the script may go on writing when memory is full, and drain.
redis.call('PEXPIRE', KEYS[1], ARGV[6])
redis.call(
    'XADD', KEYS[1], '*', 'attempt', ARGV[1], 'event', ARGV[2], 'offset', ARGV[4], 'v', 1, 'text', ARGV[5],
    unpack(ARGV, 7)
)
return {'appended', unpack(redis.call('SMEMBERS', KEYS[2]))}
