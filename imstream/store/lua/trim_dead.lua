-- Drop the oldest dead letters of a node beyond their bounds (I9). Idempotent.
--
-- KEYS[1]  stream  dead letters of the node
-- ARGV[1]  how many are kept
-- ARGV[2]  milliseconds they are kept
-- ARGV[3]  bytes of memory they may take; '' halves what they take now
-- Returns  how many were dropped

local before = redis.call('XLEN', KEYS[1])
if before == 0 then
    return 0
end
if redis.call('PTTL', KEYS[1]) == -1 then -- an older release has buried them
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
local time = redis.call('TIME')
local oldest = math.max(0, time[1] * 1000 + math.floor(time[2] / 1000) - ARGV[2])
redis.call('XTRIM', KEYS[1], 'MINID', string.format('%.0f', oldest))
redis.call('XTRIM', KEYS[1], 'MAXLEN', ARGV[1])

local function bytes()
    return redis.call('MEMORY', 'USAGE', KEYS[1], 'SAMPLES', 0)
end
local kept, used = redis.call('XLEN', KEYS[1]), bytes()
local limit = tonumber(ARGV[3]) or used / 2
while kept > 0 and used > limit do
    kept = math.floor(kept * math.max(0.9, limit / used)) -- in steps: the oldest may be smaller than others
    redis.call('XTRIM', KEYS[1], 'MAXLEN', kept)
    used = bytes()
end
if kept == 0 then
    redis.call('DEL', KEYS[1])
end
return before - kept
