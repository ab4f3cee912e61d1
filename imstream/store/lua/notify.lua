-- Leave a notice in the inbox of a node. It keeps about the newest so many, and goes when nobody leaves any.
--
-- KEYS[1]  stream  inbox of the node, expires
-- ARGV[1]  about how many notices are kept
-- ARGV[2]  milliseconds to keep the inbox
-- ARGV[3…] field, value, … of the notice
-- Returns  id of the notice

local id = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', unpack(ARGV, 3))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return id
