-- Count a violation, and lock or ban the user at a limit. A longer lock stays, and so does a ban.
--
-- KEYS[1]  number  violations within the window, expires
-- KEYS[2]  hash    account of the user
-- KEYS[3]  set     nodes that hold a socket of the user
-- ARGV[1]  milliseconds of the window, since the last violation; the time of a lock is added
-- ARGV[2]  violations that lock, 0 never
-- ARGV[3]  milliseconds of that lock
-- ARGV[4]  violations that ban, 0 never
-- ARGV[5]  the author, for operators
-- Returns  {count, 'noted' | 'locked' | 'banned', node, …}: the consequence of this one, and nodes to notify

local window, lock_after, lock_time, ban_after = unpack(ARGV, 1, 4)
local count = redis.call('INCR', KEYS[1])
redis.call('PEXPIRE', KEYS[1], window)

local function reached(limit)
    return tonumber(limit) > 0 and count >= tonumber(limit)
end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local why = {'reason', count .. ' refused contents', 'by', ARGV[5], 'at', now}

local banned, before = unpack(redis.call('HMGET', KEYS[2], 'banned', 'locked_until'))
if banned and banned ~= '' and banned ~= '0' then
    return {count, 'noted'}
end
if reached(ban_after) then
    redis.call('HSET', KEYS[2], 'banned', 1, unpack(why))
    return {count, 'banned', unpack(redis.call('SMEMBERS', KEYS[3]))}
end
if reached(lock_after) then
    redis.call('PEXPIRE', KEYS[1], window + lock_time)
    local till = now + lock_time
    if before and not (tonumber(before) and tonumber(before) <= till) then
        return {count, 'noted'}
    end
    redis.call('HSET', KEYS[2], 'locked_until', till, unpack(why))
    return {count, 'locked', unpack(redis.call('SMEMBERS', KEYS[3]))}
end
return {count, 'noted'}
