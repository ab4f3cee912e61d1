-- End a reply as cancelled; the text so far stays. Idempotent.
--
-- Another node that works on the message may have shown text that is not recorded yet: it should record it and cancel
-- the message itself.
--
-- KEYS[1]  stream  reply to the message
-- KEYS[2]  set     nodes that hold a socket of the user
-- ARGV[1]  milliseconds to keep the reply
-- ARGV[2]  the node that cancels: nothing is done if another one works on the message; '' cancels in any case
-- Returns  {'cancelled', node, …} | {'repeated', node, …} when it was cancelled before: nodes to notify, including the
--          one that works on it | {'elsewhere', the node that works on it}
--          | {'too_late'} when it ended otherwise | {'unknown'} when there is no such reply

local function fields(entry)
    local known = {}
    for i = 1, #entry[2], 2 do
        known[entry[2][i]] = entry[2][i + 1]
    end
    return known
end

-- The node of the latest 'opened', looked for from the end.
local function worker()
    local before = '+'
    while true do
        local page = redis.call('XREVRANGE', KEYS[1], before, '-', 'COUNT', 100)
        for _, entry in ipairs(page) do
            local known = fields(entry)
            if known.event == 'opened' then
                return known.by
            end
        end
        if #page < 100 then
            return nil
        end
        before = page[#page][1]
    end
end

local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if not last then
    return {'unknown'}
end
local known = fields(last)
if known.event == 'done' or known.event == 'failed' then
    return {'too_late'}
end
local node = worker()
if known.event ~= 'cancelled' and node and ARGV[2] ~= '' and ARGV[2] ~= node then
    return {'elsewhere', node}
end
local answer = {'repeated', unpack(redis.call('SMEMBERS', KEYS[2]))}
answer[#answer + 1] = node
if known.event ~= 'cancelled' then
    answer[1] = 'cancelled'
    redis.call('PEXPIRE', KEYS[1], ARGV[1])
    redis.call('XADD', KEYS[1], '*', 'attempt', known.attempt, 'event', 'cancelled', 'offset', known.offset, 'v', 1)
end
return answer
