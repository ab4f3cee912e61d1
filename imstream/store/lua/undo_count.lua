-- Take back that a message was counted, because it was not admitted; unless another request with the same id has passed
-- meanwhile and may be. (If that one is not admitted either, the message stays counted, and passes when it is sent again.)
--
-- KEYS[1]  sorted set  messages asked that day -> when
-- ARGV[1]  message id
-- ARGV[2]  when it was asked, as it was counted
-- Returns  1 when it was taken back, else 0

if tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or 0) ~= tonumber(ARGV[2]) then
    return 0
end
return redis.call('ZREM', KEYS[1], ARGV[1])
