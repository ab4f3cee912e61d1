-- Begin an attempt at a message. The reply stream decides (I4): a message that has ended, or that belongs to another
-- request, is not begun.
--
-- KEYS[1]  stream  reply to the message
-- KEYS[2]  set     nodes that hold a socket of the user
-- ARGV[1]  the request that opens: node and entry id
-- ARGV[2]  milliseconds to keep the reply
-- ARGV[3]  a request known to be lost, from which the message may be taken over; or ''
-- ARGV[4]  the last attempt known to the caller, in case Redis has lost it: no number is given twice
-- ARGV[5]  the node that works on it
-- Returns  {'opened', attempt, node, …} | {'ended', event, owner} | {'duplicate', owner}

local TERMINAL = {done = true, failed = true, cancelled = true}

local function field(entry, name)
    for i = 1, #entry[2], 2 do
        if entry[2][i] == name then
            return entry[2][i + 1]
        end
    end
end

-- The request of the latest 'opened', looked for from the end; only a repeated opening needs it.
local function owner()
    local before = '+'
    while true do
        local page = redis.call('XREVRANGE', KEYS[1], before, '-', 'COUNT', 100)
        for _, entry in ipairs(page) do
            if field(entry, 'event') == 'opened' then
                return field(entry, 'request') or ''
            end
        end
        if #page < 100 then
            return ''
        end
        before = page[#page][1]
    end
end

local nodes = redis.call('SMEMBERS', KEYS[2]) -- before any write: it fails if the key has another type
local attempt = 0
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if last then
    local event = field(last, 'event')
    if TERMINAL[event] then
        return {'ended', event, owner()}
    end
    attempt = tonumber(field(last, 'attempt'))
    if attempt > 0 then
        local request = owner()
        if request ~= ARGV[1] and request ~= ARGV[3] then
            return {'duplicate', request}
        end
    end
end
-- A write that needs no memory comes first: then the script may go on writing when memory is full, and drain.
local kept = redis.call('PEXPIRE', KEYS[1], ARGV[2])
attempt = math.max(attempt, tonumber(ARGV[4]))
redis.call(
    'XADD', KEYS[1], '*', 'attempt', attempt + 1, 'event', 'opened', 'offset', 0, 'v', 1, 'request', ARGV[1],
    'by', ARGV[5]
)
if kept == 0 then -- there was no reply yet
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return {'opened', attempt + 1, unpack(nodes)}
