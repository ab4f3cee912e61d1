/** Storage of the page in the browser: settings in Web Storage, conversations in IndexedDB. Without access, nothing. */

const MAX_CONVERSATIONS = 200; // older ones are deleted

export const local = storage("localStorage");
export const session = storage("sessionStorage");

function storage(kind) {
  const attempt = (work) => {
    try {
      return work(window[kind]);
    } catch {
      return null; // forbidden, or full
    }
  };
  return {
    get: (key) => attempt((store) => JSON.parse(store.getItem(`imstream.${key}`))),
    set: (key, value) => attempt((store) => store.setItem(`imstream.${key}`, JSON.stringify(value))),
  };
}

/**
 * The messages of one user of one service, each a record with the keys `owner` and `id`. Other tabs are notified of those that were
 * removed.
 */
export class Archive {
  isKept = true; // whether the browser keeps them; without permission it does not

  /** @param onRemoved called with the ids that another tab has removed */
  constructor(owner, onRemoved) {
    this.owner = owner;
    try {
      this.channel = new BroadcastChannel("imstream");
      this.channel.onmessage = ({ data }) => {
        if (data.owner !== owner) return;
        onRemoved(data.removed);
        this.#delete(data.removed); // this tab may have stored one of them a moment ago
      };
    } catch {
      // forbidden, like the database
    }
    this.database = opened().catch(() => undefined);
    this.database.then((database) => (this.isKept = Boolean(database)));
  }

  /** All records, the oldest first. */
  async all() {
    const records = await this.#run("readonly", (store) => store.getAll(IDBKeyRange.bound([this.owner], [this.owner, []])));
    return (records ?? []).sort((one, other) => one.at - other.at);
  }

  put(record) {
    return this.#run("readwrite", (store) => store.put({ ...record, owner: this.owner }));
  }

  remove(ids) {
    this.channel?.postMessage({ owner: this.owner, removed: ids });
    return this.#delete(ids);
  }

  #delete(ids) {
    return this.#run("readwrite", (store) => ids.map((id) => store.delete([this.owner, id])).at(-1));
  }

  /** Deletes the oldest conversations beyond the limit. Returns the records that stay. */
  async prune(records) {
    const newest = [...new Set(records.map(({ conversation }) => conversation).reverse())].slice(0, MAX_CONVERSATIONS);
    const old = records.filter(({ conversation }) => !newest.includes(conversation));
    if (old.length) await this.remove(old.map(({ id }) => id));
    return records.filter((record) => !old.includes(record));
  }

  close() {
    this.channel?.close();
  }

  async #run(mode, work) {
    try {
      const store = (await this.database)?.transaction("messages", mode).objectStore("messages");
      return store && (await result(work(store)));
    } catch {
      return undefined; // full, or the data was deleted
    }
  }
}

async function opened() {
  const request = indexedDB.open("imstream", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("messages", { keyPath: ["owner", "id"] });
  return result(request);
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
