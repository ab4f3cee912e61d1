-- Check whether a user is banned or locked, and count one more message of the day. Nothing is counted for a user who is
-- banned, locked, or has used up the quota; when one message is left, one of two nodes gets it. A message counts once,
-- however often it is sent: when it is sent again, its reply exists, or it was counted recently.
--
-- KEYS[1]  hash        account of the user
-- KEYS[2]  sorted set  messages asked today -> when; expires after the day
-- KEYS[3]  stream      reply to the message; absent when only the account is checked
-- ARGV[1]  message id
-- ARGV[2]  when it is asked, ms since 1970
-- ARGV[3]  maximum of messages a day
-- ARGV[4]  milliseconds for which a message without a reply is the same one when it is sent again
-- ARGV[5]  when the messages of the day expire, ms since 1970
-- Returns  {'banned'} | {'locked', ms left} | {'free', used} | {'spent', used}
--          | {'counted', used} when it is counted now | {'known', used} when it was before

-- Values that cannot be parsed count as a ban (fail closed).
local banned, locked = unpack(redis.call('HMGET', KEYS[1], 'banned', 'locked_until'))
if banned and banned ~= '' and banned ~= '0' then
    return {'banned'}
end
if locked then
    local till = tonumber(locked)
    if not till or not (till < 2e14) then -- the year 8300, or no number
        return {'banned'}
    end
    local time = redis.call('TIME')
    local left = till - time[1] * 1000 - math.floor(time[2] / 1000)
    if left > 0 then
        return {'locked', left}
    end
    redis.call('HDEL', KEYS[1], 'locked_until', 'reason', 'by', 'at') -- it is over
end

local used = redis.call('ZCARD', KEYS[2])
if #KEYS == 2 then
    return {'free', used}
end
if redis.call('EXISTS', KEYS[3]) == 1 then
    return {'known', used}
end
local before = redis.call('ZSCORE', KEYS[2], ARGV[1])
if before and ARGV[2] - before < tonumber(ARGV[4]) then
    -- Another request may have counted it a moment ago, and not be admitted: then it must stay counted for this one.
    redis.call('ZADD', KEYS[2], math.max(tonumber(ARGV[2]), before + 1), ARGV[1])
    return {'known', used}
end
if used >= tonumber(ARGV[3]) then
    return {'spent', used}
end
if before then
    -- Its answer was given and is forgotten, so it will cost another one. No message id has a # in it.
    redis.call('ZADD', KEYS[2], before, ARGV[1] .. '#' .. before)
end
redis.call('ZADD', KEYS[2], ARGV[2], ARGV[1])
if used == 0 then -- once a day: of two writes, the append-only file gets four commands
    redis.call('PEXPIREAT', KEYS[2], ARGV[5])
end
return {'counted', used + 1}
