-- Delete the keys of a node that is gone for good: no unfinished requests, no lease, no adopter. Its dead letters
-- stay until they expire; those that an older release has buried have no expiry yet.
--
-- KEYS[1]  string  lease of the node
-- KEYS[2]  string  its adopter
-- KEYS[3]  stream  its requests
-- KEYS[4]  hash    user -> unfinished requests
-- KEYS[5]  stream  its inbox
-- KEYS[6]  string  the Redis on which it last held its lease
-- KEYS[7]  stream  its dead letters
-- KEYS[8]  hash    its status
-- ARGV[1]  milliseconds to keep dead letters
-- Returns  1 when they are deleted, 0 when it is not gone

if redis.call('EXISTS', KEYS[1], KEYS[2]) > 0 or redis.call('XLEN', KEYS[3]) > 0 then
    return 0
end
if redis.call('PTTL', KEYS[7]) == -1 then
    redis.call('PEXPIRE', KEYS[7], ARGV[1])
end
redis.call('DEL', KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[8])
return 1
