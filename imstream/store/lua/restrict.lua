-- Ban or lock a user, whatever the state before.
--
-- KEYS[1]  hash    account of the user
-- KEYS[2]  set     nodes that hold a socket of the user; read after the write, so that no login falls between
-- ARGV[1]  milliseconds of a lock, or 'ban'
-- ARGV[2]  reason, for operators
-- ARGV[3]  the author, for operators
-- Returns  {end in ms since 1970, 0 for a ban; node, …}

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local till = 0
if ARGV[1] == 'ban' then
    redis.call('HSET', KEYS[1], 'banned', 1)
else
    till = now + ARGV[1]
    redis.call('HSET', KEYS[1], 'locked_until', till)
end
redis.call('HSET', KEYS[1], 'reason', ARGV[2], 'by', ARGV[3], 'at', now)
return {till, unpack(redis.call('SMEMBERS', KEYS[2]))}
