-- Move one dead letter back to the requests: test the caps as admit.lua does, append, count, and delete the letter, in one
-- step (I2). Repeated, it does nothing: there is no such letter. The first attempt at the request reopens the reply, see
-- open.lua; if the reply was not recorded as failed, but answered, nothing is answered twice.
--
-- KEYS[1]  stream  requests of the node
-- KEYS[2]  hash    user -> unfinished requests
-- KEYS[3]  stream  dead letters of the node
-- ARGV[1]  maximum of unfinished requests of the node
-- ARGV[2]  maximum of unfinished requests of one user
-- ARGV[3]  id of the letter
-- Returns  {'retried', entry id} | {'unknown'}: purged, or retried before | {'node_full'} | {'user_full'}

local letter = redis.call('XRANGE', KEYS[3], ARGV[3], ARGV[3])[1]
if not letter then
    return {'unknown'}
end
local DROPPED = {reason = true, error = true, attempts = true, dead_at = true, reopens = true, v = true}
local known, fields = {}, {}
for i = 1, #letter[2], 2 do
    local name, value = letter[2][i], letter[2][i + 1]
    if not DROPPED[name] and not known[name] then
        fields[#fields + 1], fields[#fields + 2] = name, value
    end
    known[name] = value
end
local user = known.user or ''
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then
    return {'node_full'}
end
if tonumber(redis.call('HGET', KEYS[2], user) or 0) >= tonumber(ARGV[2]) then
    return {'user_full'}
end
-- Releases that do not reopen replies do not support version 2, and leave the request to a node that does.
fields[#fields + 1], fields[#fields + 2] = 'reopens', known.attempts or '0'
fields[#fields + 1], fields[#fields + 2] = 'v', '2'
local id = redis.call('XADD', KEYS[1], '*', unpack(fields)) -- first: it is refused when memory is full
redis.call('HINCRBY', KEYS[2], user, 1)
redis.call('XDEL', KEYS[3], ARGV[3])
return {'retried', id}
