-- Append the terminal event to a reply, and then remove its request from the stream: one round trip instead of two. All
-- keys must be on one server. Made of append.lua and finish.lua.
--
-- KEYS[1]  KEYS[2]  those of `append`
-- KEYS[3]  KEYS[4]  those of `finish`
-- ARGV[1]  number of the arguments of `append`, which follow
-- ARGV[…]  those of `finish`
-- Returns  {answer of `append`} when it is refused | {answer of `append`, answer of `finish`}; repeated, the same again

local count = tonumber(ARGV[1])
local appended = append({KEYS[1], KEYS[2]}, {unpack(ARGV, 2, 1 + count)})
if appended[1] ~= 'appended' and appended[1] ~= 'repeated' then
    return {appended}
end
local finished = finish({KEYS[3], KEYS[4]}, {unpack(ARGV, 2 + count)})
if appended[1] == 'repeated' then
    finished[1] = 1 -- the earlier try, whose answer was lost, has removed it
end
return {appended, finished}
