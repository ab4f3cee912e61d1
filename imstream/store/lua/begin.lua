-- Admit one request and, if no other one waits for a worker, deliver it to this one and open its reply: one round trip
-- instead of three. All keys must be on one server. Made of admit.lua and open.lua.
--
-- KEYS[1]  KEYS[2]          those of `admit`
-- KEYS[3]  KEYS[4] KEYS[5]  those of `open`
-- ARGV[1]  consumer
-- ARGV[2]  number of the arguments of `admit`, which follow
-- ARGV[…]  those of `open`; the first one without the entry id, which is appended to it
-- Returns  {answer of `admit`, answer of `open`} | {answer of `admit`}

local count = tonumber(ARGV[2])
local admitted = admit({KEYS[1], KEYS[2]}, {unpack(ARGV, 3, 2 + count)})
if admitted[1] ~= 'admitted' or admitted[3] > 1 then
    return {admitted}
end
local group = ARGV[5]
local delivered = redis.pcall('XREADGROUP', 'GROUP', group, ARGV[1], 'COUNT', 1, 'STREAMS', KEYS[1], '>')
if not delivered or delivered.err or delivered[1][2][1][1] ~= admitted[2] then
    return {admitted}
end
local arguments = {unpack(ARGV, 3 + count)}
arguments[1] = arguments[1] .. admitted[2]
-- An error must not hide that the request is in the stream, where it is found without a job: that one handles the error.
local works, opened = pcall(open, {KEYS[3], KEYS[4], KEYS[5]}, arguments)
return {admitted, works and opened or nil}
