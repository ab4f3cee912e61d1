-- Release the lease of a node, unless another process holds it.
--
-- KEYS[1]  string  lease of the node
-- ARGV[1]  instance that releases it
-- Returns  1 when it was released, else 0

local holder = redis.call('GET', KEYS[1])
if not holder or not string.find(holder, ARGV[1], 1, true) then
    return 0
end
return redis.call('DEL', KEYS[1])
