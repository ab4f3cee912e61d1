-- Undo the count of a message that was not admitted, unless another request with the same id was let through meanwhile
-- and may be admitted. (If it is not, the message stays counted, and is not counted again when it is sent again.)
--
-- KEYS[1]  sorted set  messages asked that day -> when
-- ARGV[1]  message id
-- ARGV[2]  when it was asked, as counted
-- Returns  1 when it was undone, else 0

if tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or 0) ~= tonumber(ARGV[2]) then
    return 0
end
return redis.call('ZREM', KEYS[1], ARGV[1])
