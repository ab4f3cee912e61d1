-- Lift a ban or lock, and forget the violations that led to it.
--
-- KEYS[1]  hash    account of the user
-- KEYS[2]  number  violations within the window
-- ARGV[1]  banned | locked_until
-- Returns  1 when there was one, else 0

local taken_back = redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[2])
if redis.call('HEXISTS', KEYS[1], 'banned') + redis.call('HEXISTS', KEYS[1], 'locked_until') == 0 then
    redis.call('HDEL', KEYS[1], 'reason', 'by', 'at')
end
return taken_back
