-- Append a notice to the inbox of a node. The inbox is trimmed, and expires after the last notice.
--
-- KEYS[1]  stream  inbox of the node, expires
-- ARGV[1]  about how many notices are kept
-- ARGV[2]  milliseconds to keep the inbox
-- ARGV[3…] field, value, … of the notice
-- Returns  id of the notice

local id = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', unpack(ARGV, 3))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return id
