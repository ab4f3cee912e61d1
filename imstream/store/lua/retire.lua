-- Delete the keys of a node that is gone for good: no unfinished requests, no lease, no adopter. Its dead letters
-- stay until they expire.
--
-- KEYS[1]  string  lease of the node
-- KEYS[2]  string  its adopter
-- KEYS[3]  stream  its requests
-- KEYS[4]  hash    user -> unfinished requests
-- KEYS[5]  stream  its inbox
-- KEYS[6]  string  the Redis on which it last held its lease
-- KEYS[7]  hash    its status
-- Returns  1 when they are deleted, 0 when it is not gone

if redis.call('EXISTS', KEYS[1], KEYS[2]) > 0 or redis.call('XLEN', KEYS[3]) > 0 then
    return 0
end
redis.call('DEL', unpack(KEYS, 3))
return 1
