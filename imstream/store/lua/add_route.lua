-- Record that a node holds a socket of a user, and number the login: of two logins, all nodes agree which is newer.
--
-- KEYS[1]  set   nodes that hold a socket of the user, expires
-- KEYS[2]  hash  account of the user; usually absent
-- ARGV[1]  node
-- ARGV[2]  milliseconds to keep it
-- Returns  {number of the login, 1 when there is an account, node, …}

redis.call('SADD', KEYS[1], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
local now = redis.call('TIME')
return {
    now[1] .. string.format('%06d', now[2]), redis.call('EXISTS', KEYS[2]), unpack(redis.call('SMEMBERS', KEYS[1]))
}
