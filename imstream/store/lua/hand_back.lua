-- Set the delivery count of one pending request that did not die with its worker, if it still has that consumer: it may
-- have been claimed meanwhile (I7).
--
-- KEYS[1]  stream  requests of a node
-- ARGV[1]  consumer group
-- ARGV[2]  consumer that has it
-- ARGV[3]  entry id
-- ARGV[4]  deliveries to note
-- ARGV[5]  consumer that has it from now on: usually the same
-- Returns  1 when it was noted, else 0

local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
if #pending == 0 or pending[1][2] ~= ARGV[2] then
    return 0
end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[5], 0, ARGV[3], 'RETRYCOUNT', ARGV[4], 'JUSTID')
return 1
