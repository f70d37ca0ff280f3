// Pinned nodes and their groups: a list, and a small graph of their own. The address keeps them.
const isPinned=i=>pinned.includes(i)||groups.some(g=>g.members.includes(i));
function pin(i){if(isPinned(i)){const at_=pinned.indexOf(i);if(at_>=0)pinned.splice(at_,1);groups.forEach(g=>{g.members=g.members.filter(m=>m!==i)});groups=groups.filter(g=>g.members.length>1||(g.members.forEach(m=>pinned.push(m)),false))}
else pinned.push(i);changed()}
function changed(){paint();details();pins_();if($('only').checked)fit();remember()}
function pins_(){const box=$('pins'),marked=new Set();box.textContent='';if(!pinned.length&&!groups.length)return;make(box,'h3','',`pinned (${pinned.length+groups.reduce((a,g)=>a+g.members.length,0)})`);
groups.forEach(g=>{const l=make(box,'div','line'),name=make(l,'input');name.type='text';name.className='group';name.value=g.name;name.setAttribute('aria-label','name of the group');
name.addEventListener('input',()=>{g.name=name.value;if($('only').checked)drawPinned();remember()});make(l,'span','note',`${g.members.length} nodes`).style.flex='none';
const b=make(l,'button','','ungroup');b.onclick=()=>{groups=groups.filter(h=>h!==g);g.members.forEach(m=>pinned.push(m));changed()};
l.title=plainText(g.members.map(m=>whole(data.nodes[m])+placed(data.nodes[m])).join('\n'))});
const button=document.createElement('button');
pinned.forEach(i=>{const n=data.nodes[i],l=make(box,'div','line'),tick=make(l,'input');tick.type='checkbox';tick.className='tick';tick.setAttribute('aria-label','for a group');
tick.onchange=()=>{tick.checked?marked.add(i):marked.delete(i);button.disabled=marked.size<2};const s=make(l,'span','',whole(n)+placed(n));s.title=plainText(whole(n)+placed(n));s.style.cursor='pointer';s.onclick=()=>choose(i);
const b=make(l,'button','','×');b.title='unpin';b.onclick=()=>pin(i)});
const bar=make(box,'div','bar');bar.append(button);button.textContent='group ticked';button.id='group';button.disabled=true;
button.onclick=()=>{const members=[...marked];groups.push({name:short(nameOf(data.nodes[members[0]]),40)+' …',members});members.forEach(m=>pinned.splice(pinned.indexOf(m),1));changed()};
const names=make(bar,'button','','export labels');names.id='labels';names.title='labels typed here, as JSON for to_html(labels=...)';names.onclick=()=>save('labels.json',labelFile(data.of,typed.all()),'application/json');
const part=make(bar,'button','','export pinned');part.id='part';part.title='pinned nodes, groups and the edges among them, as JSON';part.onclick=()=>save('pinned.json',JSON.stringify(exported(),null,1)+'\n','application/json')}
const exported=()=>({nodes:[...pinned,...groups.flatMap(g=>g.members)].map(i=>data.nodes[i].name),groups:groups.map(g=>({name:g.name,members:g.members.map(i=>data.nodes[i].name)})),
edges:pinnedEdges().map(e=>({from:e.from.name,to:e.to.name,weight:e.w}))});

const BOX=[168,36],ROOM=[196,92];
const units=()=>[...pinned.map(i=>({name:nameOf(data.nodes[i]),place:placed(data.nodes[i]),members:[i],group:false})),...groups.map(g=>({name:g.name,place:`${g.members.length} nodes`,members:g.members,group:true}))];
// The weights between the members of two units, added up.
function pinnedEdges(all=units()){const of=new Map();all.forEach(u=>u.members.forEach(m=>of.set(m,u)));const found=new Map();
data.edges.forEach(([s,t,w])=>{const a=of.get(s),b=of.get(t);if(!a||!b||a===b)return;const key=all.indexOf(a)+' '+all.indexOf(b);if(!found.has(key))found.set(key,{from:a,to:b,w:0});found.get(key).w+=w||0});return[...found.values()]}
function arranged(){const all=units(),mean=(u,f)=>u.members.reduce((a,i)=>a+f(data.nodes[i]),0)/u.members.length;
all.forEach(u=>{u.row=Math.round(mean(u,n=>level.get(n.row)));u.column=mean(u,n=>n.pos||0)});
const rows=[...new Set(all.map(u=>u.row))].sort((a,b)=>b-a),widest=Math.max(1,...rows.map(r=>all.filter(u=>u.row===r).length));
rows.forEach((r,j)=>{const here=all.filter(u=>u.row===r).sort((a,b)=>a.column-b.column);here.forEach((u,i)=>{u.x=(i+.5+(widest-here.length)/2)*ROOM[0];u.y=(j+.5)*ROOM[1]})});
return[all,[widest*ROOM[0],Math.max(1,rows.length)*ROOM[1]]]}
const subSize=()=>arranged()[1];
function drawPinned(){subLayer.textContent='';const [all]=arranged();if(!all.length){el(subLayer,'text',{class:'axis',x:ROOM[0]/2,y:ROOM[1]/2,'text-anchor':'middle'},'nothing is pinned');return}
const edges=pinnedEdges(all),most=edges.reduce((a,e)=>Math.max(a,Math.abs(e.w)),0)||1;
edges.forEach(e=>{const {x:x1,y:y1}=e.from,{x:x2,y:y2}=e.to,m=(y1+y2)/2;el(subLayer,'path',{class:'edge '+(e.w<0?'lowers':'raises'),d:`M${x1} ${y1}C${x1} ${m} ${x2} ${m} ${x2} ${y2}`,
'stroke-opacity':.75,'stroke-width':(.8+6*Math.sqrt(Math.abs(e.w)/most)).toFixed(2)})});
// The sums stand at different heights of their lines, so that lines that cross in the middle keep theirs apart.
edges.forEach((e,i)=>{const t=.28+.44*((i*.618)%1),s=t*t*(3-2*t),{x:x1,y:y1}=e.from,{x:x2,y:y2}=e.to,m=(y1+y2)/2;
el(subLayer,'text',{class:'sum',x:x1+(x2-x1)*s,y:y1*(1-t)**3+3*m*t*(1-t)+y2*t**3+4},signed(e.w))});
all.forEach(u=>{const g=el(subLayer,'g',{class:'box'+(u.group?' group':'')+(u.members.includes(chosen)?' on':''),tabindex:0,role:'button',transform:`translate(${u.x} ${u.y})`});
el(g,'rect',{x:-BOX[0]/2,y:-BOX[1]/2,width:BOX[0],height:BOX[1],rx:5});el(g,'text',{'text-anchor':'middle',y:-2},short(u.name,26));el(g,'text',{class:'place','text-anchor':'middle',y:12},short(u.place.trim(),28));
el(g,'title',{},u.members.map(i=>whole(data.nodes[i])+placed(data.nodes[i])).join('\n'));g.addEventListener('click',()=>choose(u.members[0]));g.addEventListener('keydown',v=>{if(v.key==='Enter')choose(u.members[0])})})}

addEventListener('keydown',e=>{if(typing(e))return;if(e.key==='Escape'&&chosen!==null)choose(chosen);if(chosen===null)return;const n=data.nodes[chosen];
if(e.key==='p')pin(chosen);if(e.key==='x'&&n.kind!=='readout'&&n.pos!==null)take(chosen)});
function remember(){keep({node:chosen,pin:pinned.join(','),groups:groups.length?JSON.stringify(groups.map(g=>[g.name,...g.members])):'',off:[...removed].join(','),only:$('only').checked?1:''})}
// From the address: only numbers of nodes that there are.
function restore(){const s=state(),fits=v=>/^\d{1,7}$/.test(String(v))&&+v<data.nodes.length,numbers=k=>[...new Set((s.get(k)||'').split(',').filter(fits).map(Number))];
let given=[];try{const got=JSON.parse(s.get('groups')||'[]');if(Array.isArray(got))given=got}catch(e){}const taken_=new Set();
given.forEach(g=>{if(!Array.isArray(g)||typeof g[0]!=='string')return;const members=[...new Set(g.slice(1).filter(fits).map(Number))].filter(m=>!taken_.has(m));if(members.length>1){members.forEach(m=>taken_.add(m));groups.push({name:g[0],members})}});
numbers('pin').filter(i=>!taken_.has(i)).forEach(i=>pinned.push(i));numbers('off').filter(i=>data.nodes[i].kind!=='readout'&&data.nodes[i].pos!==null).forEach(i=>removed.add(i));
if(s.get('only')==='1'&&(pinned.length||groups.length))$('only').checked=true;const node=s.get('node');if(node!==null&&fits(node)){chosen=+node;light(data.nodes[chosen].pos)}
paint();details();pins_();taken();if($('only').checked)fit()}
