-- End a reply as cancelled; the text so far stays. May be repeated.
--
-- KEYS[1]  stream  reply to the message
-- ARGV[1]  milliseconds to keep the reply
-- Returns  'cancelled' | 'too_late' when it ended otherwise | 'unknown' when there is no such reply

local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if not last then
    return 'unknown'
end
local known = {}
for i = 1, #last[2], 2 do
    known[last[2][i]] = last[2][i + 1]
end
if known.event == 'cancelled' then
    return 'cancelled'
end
if known.event == 'done' or known.event == 'failed' then
    return 'too_late'
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('XADD', KEYS[1], '*', 'attempt', known.attempt, 'event', 'cancelled', 'offset', known.offset)
return 'cancelled'
