-- Claim one pending request and set its delivery count: one of a consumer that is dead, or one of ours that we do not
-- work on, or hand back.
--
-- KEYS[1]  stream  requests of the node
-- KEYS[2]  string  lease of that node
-- ARGV[1]  consumer group
-- ARGV[2]  consumer that claims it
-- ARGV[3]  consumer that it had when it was listed
-- ARGV[4]  entry id
-- ARGV[5]  deliveries to note
-- ARGV[6]  '1' when that consumer is the node of the stream: then it must hold no lease (I7)
-- ARGV[7]  '1' to return nothing: the entry is handed back
-- Returns  fields of the entry, as field, value, … | nil when it has another consumer, or has ended

local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[4], ARGV[4], 1)
if #pending == 0 or pending[1][2] ~= ARGV[3] then
    return nil
end
if ARGV[6] == '1' and redis.call('EXISTS', KEYS[2]) == 1 then
    return nil
end
local entries = redis.call('XRANGE', KEYS[1], ARGV[4], ARGV[4])
if #entries == 0 then -- it was deleted by hand, and not acknowledged
    redis.call('XACK', KEYS[1], ARGV[1], ARGV[4])
    return nil
end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[4], 'RETRYCOUNT', ARGV[5], 'JUSTID')
return ARGV[7] ~= '1' and entries[1][2] or nil
