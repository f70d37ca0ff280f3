// The list: every subcomponent as a row; only those in sight are in the document.
function showList(data,open){const N=data.id.length,rows=$('rows'),space=$('space'),H=30,typed=labels(data.of);
const label=i=>typed.get(data.sites[data.site[i]],data.id[i],data.label[i]);
const text=(list)=>list.map(t=>data.vocab[t]).join('\u0001').toLowerCase();
const byToken=data.tokens.map((t,i)=>text(t)+'\u0001'+text(data.predicted[i]));
const s=state();let order=[],at=+(s.get('at')||0),drawn=new Map();
data.sites.forEach((name,i)=>{const o=make($('site'),'option','',short(name,60));o.value=i});
const controls={site:'',sort:'use',q:'',in:'both',group:'',dead:''};
for(const k in controls){const e=$(k),v=s.get(k);if(e.type==='checkbox')e.checked=v==='1';else{e.value=v===null?controls[k]:v;if(e.value===''&&e.tagName==='SELECT')e.value=controls[k]}}
if(data.effect===null)[...$('sort').options].filter(o=>o.value==='effect').forEach(o=>o.remove());
const KEYS={use:i=>-data.rate[i],importance:i=>-data.importance[i],effect:i=>data.effect===null||data.effect[i]===null?1:-data.effect[i],activation:i=>-data.activation[i],unlabelled:i=>label(i)?1:0,id:i=>0};
function choose(){const site=$('site').value,q=$('q').value.toLowerCase(),where=$('in').value,dead=$('dead').checked,key=KEYS[$('sort').value]||KEYS.use;
const fits=i=>{if(site!==''&&data.site[i]!=site)return false;if(!dead&&data.rate[i]===0)return false;if(!q)return true;
if(where!=='tokens'&&(label(i)||'').toLowerCase().includes(q))return true;if(where!=='labels'&&byToken[i].includes(q))return true;
return where==='both'&&(data.sites[data.site[i]]+' '+data.id[i]).toLowerCase().includes(q)};
const found=[];for(let i=0;i<N;i++)if(fits(i))found.push(i);
const keyed=found.map(i=>key(i)),index=found.map((_,k)=>k);
index.sort((a,b)=>keyed[a]-keyed[b]||data.rate[found[b]]-data.rate[found[a]]||found[a]-found[b]);order=index.map(k=>found[k]);
if($('group').checked){const groups=new Map();order.forEach(i=>{const t=data.tokens[i].length?data.tokens[i][0]:-1;if(!groups.has(t))groups.set(t,[]);groups.get(t).push(i)});
order=[];[...groups].sort((a,b)=>b[1].length-a[1].length).forEach(([t,ids])=>{order.push({t,n:ids.length});order.push(...ids)})}
at=Math.max(0,Math.min(at,order.length-1));space.style.height=order.length*H+'px';for(const e of drawn.values())e.remove();drawn.clear();
$('count').textContent=`${found.length.toLocaleString('en')} of ${N.toLocaleString('en')}`;draw();
keep({site,sort:$('sort').value==='use'?'':$('sort').value,q:$('q').value,in:where==='both'?'':where,group:$('group').checked?1:'',dead:dead?1:'',at:at||''})}
const top=Math.max(1e-9,...data.rate);
function row(k){const i=order[k];if(typeof i==='object'){const e=make(null,'div','group');e.style.top=k*H+'px';make(e,'span','tok',i.t<0?'never fires':short(shown(data.vocab[i.t]),40));
make(e,'span','note',` top token of ${i.n}`);return e}
const e=document.createElement(data.page[i]?'a':'div');e.className='row';if(data.page[i]&&!open.inside)e.href=open.href(i);e.style.top=k*H+'px';e.dataset.row=k;
const mine=label(i);make(e,'span',mine?'lab':'lab auto',short(mine||data.auto[i]||'–',120));
const name=make(e,'span','sub');make(name,'span','',short(data.sites[data.site[i]],60));make(name,'span','',' · '+data.id[i]).style.whiteSpace='pre';name.title=plainText(data.sites[data.site[i]]);
const r=make(e,'span','rate num');make(r,'i').style.width=Math.round(40*Math.sqrt(data.rate[i]/top))+'px';make(r,'span','',percent(data.rate[i]));
make(e,'span','num',number(data.importance[i]));make(e,'span','num',data.effect===null?'–':number(data.effect[i]));
for(const list of [data.tokens[i],data.predicted[i]]){const c=make(e,'span','');list.slice(0,5).forEach(t=>{make(c,'span','tok',short(shown(data.vocab[t]),24));c.append(' ')})}
e.onclick=v=>{at=k;keep({at:at||''});if(open.inside){v.preventDefault();open.go(i)}else if(data.page[i])e.href=open.href(i)};return e}
function draw(){const from=Math.max(0,Math.floor(rows.scrollTop/H)-8),to=Math.min(order.length,Math.ceil((rows.scrollTop+rows.clientHeight)/H)+8);
for(const [k,e] of drawn)if(k<from||k>=to){e.remove();drawn.delete(k)}
for(let k=from;k<to;k++)if(!drawn.has(k)){const e=row(k);space.append(e);drawn.set(k,e)}
for(const [k,e] of drawn)e.classList.toggle('at',k===at)}
function move(by){let k=at+by;while(k>=0&&k<order.length&&typeof order[k]==='object')k+=by>0?1:-1;if(k<0||k>=order.length)return;at=k;
if(at*H<rows.scrollTop)rows.scrollTop=at*H;else if((at+1)*H>rows.scrollTop+rows.clientHeight)rows.scrollTop=(at+1)*H-rows.clientHeight;draw();keep({at:at||''})}
function enter(){const i=order[at];if(typeof i!=='object'&&i!==undefined&&data.page[i])open.go(i)}
rows.addEventListener('scroll',draw);addEventListener('resize',draw);
for(const k in controls){$(k).addEventListener($(k).type==='search'?'input':'change',()=>{at=0;rows.scrollTop=0;choose()})}
addEventListener('keydown',e=>{if(e.key==='Escape'&&document.activeElement===$('q')){$('q').blur();return}
if(e.key==='Enter'&&document.activeElement===$('q')){$('q').blur();return}
if(typing(e)||open.busy())return;const moves={j:1,ArrowDown:1,k:-1,ArrowUp:-1,PageDown:15,PageUp:-15};
if(e.key in moves){e.preventDefault();move(moves[e.key])}else if(e.key==='Enter'&&(!document.activeElement||document.activeElement===document.body))enter();
else if(e.key==='/'){e.preventDefault();$('q').focus();$('q').select()}
else if(e.key==='g'){$('group').checked=!$('group').checked;choose()}
else if(e.key==='s'){const o=$('sort');o.selectedIndex=(o.selectedIndex+1)%o.options.length;choose()}});
$('export').onclick=()=>{const all=Object.create(null);for(let i=0;i<N;i++){const l=label(i);if(l)all[labelKey(data.sites[data.site[i]],data.id[i])]=l}
save('labels.json',labelFile(data.of,all),'application/json')};
$('import').onchange=async e=>{const file=e.target.files[0];if(!file)return;let n=0;try{const got=JSON.parse(await file.text());
if(got.format!=='spd_lens labels')throw new Error('this is no file of labels');if(got.decomposition!==data.of)throw new Error('these are labels of another decomposition');
for(const site of Object.keys(got.labels))for(const id of Object.keys(got.labels[site]))if(typeof got.labels[site][id]==='string'){typed.set(site,+id,got.labels[site][id]);n++}
$('message').textContent=`${n} labels read`}catch(error){$('message').textContent=plainText('not read: '+error.message)}e.target.value='';choose()};
addEventListener('pageshow',e=>{if(e.persisted){typed.reload();choose()}});
choose();if(at){rows.scrollTop=Math.max(0,at*H-rows.clientHeight/2);draw()}
return{refresh(){typed.reload();choose()}}}
