-- Record that a message waits for a worker, unless its reply exists.
--
-- KEYS[1]  stream  reply to the message
-- ARGV[1]  milliseconds to keep it
-- Returns  1 when it was marked, 0 when the reply stream was there

if redis.call('EXISTS', KEYS[1]) == 1 then
    return 0
end
redis.call('XADD', KEYS[1], '*', 'attempt', 0, 'event', 'queued', 'offset', 0, 'v', 1)
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
