-- Whether Redis was restarted or replaced since a node last held its lease: then both may have ended together.
--
-- KEYS[1]  string  the Redis on which the node last held its lease (see acquire_lease.lua)
-- Returns  1 when it was another run, 0 when it is the same or unknown

local known = redis.pcall('GET', KEYS[1])
local run = type(known) == 'string' and string.match(known, '^(%S+) ')
return run and run ~= string.match(redis.call('INFO', 'server'), 'run_id:(%w+)') and 1 or 0
