-- Take the lease of a node, or renew it: whoever holds it is the one process that may run under this id.
--
-- KEYS[1]  string  lease of the node, expires
-- ARGV[1]  instance: a word that no other process has
-- ARGV[2]  the holder as JSON, with the instance in it
-- ARGV[3]  milliseconds
-- ARGV[4]  an instance known to be dead, whose lease may be taken over; or ''
-- Returns  {'held'} by us from now on | {'refused', the holder as JSON, milliseconds left}

local holder = redis.call('GET', KEYS[1])
if holder then
    local ours = string.find(holder, ARGV[1], 1, true)
    local dead = ARGV[4] ~= '' and string.find(holder, ARGV[4], 1, true)
    if ours then -- and no SET, which is refused when memory is full
        redis.call('PEXPIRE', KEYS[1], ARGV[3])
        return {'held'}
    end
    if not dead then
        return {'refused', holder, redis.call('PTTL', KEYS[1])}
    end
end
-- A write that needs no memory comes first: then the script may go on writing when memory is full, and the node drain.
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return {'held'}
