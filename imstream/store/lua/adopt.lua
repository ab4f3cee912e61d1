-- Adopt the stream of a node without a lease, or renew the adoption (I7).
--
-- KEYS[1]  string  lease of that node
-- KEYS[2]  string  its adopter, expires
-- KEYS[3]  stream  its requests
-- ARGV[1]  the node that adopts
-- ARGV[2]  milliseconds of the adoption
-- Returns  {'adopted', unfinished requests, id of the first or ''} | {'back'} when the node is alive | {'taken', adopter}

if redis.call('EXISTS', KEYS[1]) == 1 then
    return {'back'}
end
local adopter = redis.call('GET', KEYS[2])
if adopter and adopter ~= ARGV[1] then
    return {'taken', adopter}
end
-- A write that needs no memory comes first: then the script may go on writing when memory is full.
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
local first = redis.call('XRANGE', KEYS[3], '-', '+', 'COUNT', 1)[1]
return {'adopted', redis.call('XLEN', KEYS[3]), first and first[1] or ''}
